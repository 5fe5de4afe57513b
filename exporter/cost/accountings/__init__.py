"""How others count, one accounting per file: `--accounting NAME` shows its figures beside ours."""
