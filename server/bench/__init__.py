"""``castor bench``: the load that is put on servers, what is measured of it, and how it is told."""
