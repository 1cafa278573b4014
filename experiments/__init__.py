"""Scripts, one question each; `python -m experiments.NAME --help` says what it asks and its flags."""
