"""functok: which tokens open a language model's memory?"""

__version__ = "0.1.0"
