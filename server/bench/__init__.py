"""``castor bench``: the load that is put on a server, what is measured of it, and how the results are reported."""
