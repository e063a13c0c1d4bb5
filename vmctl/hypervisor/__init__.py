"""The only room that imports libvirt. Callers get vmctl's types and errors, never a libvirt object."""
