"""What the engine tells, in the words of the Gemini API: candidates, log-probabilities, usage."""
