"""The front end: the Gemini REST format on one side, the engine protocol on the other. Never imports torch."""
