"""What operators configure: settings and the models file."""
