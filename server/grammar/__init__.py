"""From schemas and functions to grammars that answers must follow."""
