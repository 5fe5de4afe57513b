"""How an answer is scored: one metric per file, named in a question's line."""
