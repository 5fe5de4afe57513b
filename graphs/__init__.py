"""Visual-token reduction methods, one per file. Nothing here knows a model family."""
