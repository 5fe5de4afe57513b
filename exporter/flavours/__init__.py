"""One file per flavour: a rewriting of the language model's plain graphs for one runtime. A profile chooses it by name."""
