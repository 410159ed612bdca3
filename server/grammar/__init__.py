"""From schemas and functions to grammars that answers must follow, and checks of what these cannot enforce."""
