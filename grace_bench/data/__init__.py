"""Edit requests, the streams that hold them, and the Avalanche benchmark built from a stream."""
