"""Text from a model: `loop.generate` draws one token after another with a key/value cache; the other files choose otherwise."""
