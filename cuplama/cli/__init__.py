"""The command line, one module per command. Text goes to stdout, everything else to stderr; no model code is here."""
