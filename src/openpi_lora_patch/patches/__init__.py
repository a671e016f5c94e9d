"""What is patched, one file a module; each has `patch(module, settings, undo)`, which records how to take it back.

It returns None, or why it left the module alone.
"""
