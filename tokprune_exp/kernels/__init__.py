"""The parts of gathered running that a processor has its own fast way for; the plain ones are in `encoder/`."""
