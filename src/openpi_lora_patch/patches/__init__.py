"""What is patched, one file a module; each has `patch(module, settings, undo)`, which records how to take it back.

These files import what they patch, so they are imported by the hooks only, never by the package itself.
"""
