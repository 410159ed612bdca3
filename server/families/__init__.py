"""Model families: how each writes thoughts and calls, and the parser that reads them back."""
