"""Networks from the literature, built from their publications: what other people's networks contain.

None of them knows of quantization. `width` and `depth` make them small; the defaults are the published sizes.
"""
