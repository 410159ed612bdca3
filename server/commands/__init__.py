"""The commands behind ``castor``; each is imported when it is called, so that the others stay quick."""
