"""From the message of a request to the answer of its engine, for every surface that generates. Free of HTTP."""
