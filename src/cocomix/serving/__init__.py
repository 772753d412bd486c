"""An OpenAI-compatible endpoint that generates, steers and explains text."""
