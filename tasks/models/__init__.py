"""Language models and their tokenizers: loading, hooks, text."""
