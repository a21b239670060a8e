"""The control API: what is told, what can be changed, and who may."""
