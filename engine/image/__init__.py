"""The image of a proved model: a first start with torch keeps it, later ones serve it without torch.

What the C forward computes with is a few structures that point to each other, to the file of panels and to the cache of
keys and values. An image is these structures' bytes and a list of their pointers, as a linker has them. It belongs to
its sources, to this code and to these settings, and what it computes must be what was computed when it was kept, to the
last bit; any other start goes the way of the first one.
"""
