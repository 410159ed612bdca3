"""HTTP as it is spoken: connections, bodies, streams."""
