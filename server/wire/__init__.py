"""Gemini JSON as typed values: what is understood, what is served, and Google's words for what is not."""
