"""What limits the tokens that may come next: masks, and the grammars that compute them."""
