"""Files that clients upload: a store that survives crashes, uploads that can be resumed, and the forms they come in."""
