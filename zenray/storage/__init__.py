"""Put and get bytes safely: the object-store seam, manifests, checksums, atomic publish, and the cache of a node."""
