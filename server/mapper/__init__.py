"""The engine's events in the words of the Gemini API: candidates, log-probabilities, usage."""
