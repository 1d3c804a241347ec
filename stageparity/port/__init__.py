"""Someone else's model under test: traced in its own interpreter, judged from the tensors that it left behind."""
