"""Adapter files: the diffusers, peft and kohya layouts, read and written tensor by tensor."""
