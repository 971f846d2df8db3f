"""The modules behind the notebooks of the MoE quantization lab.

Each module teaches one thing and can be read by itself: the values a format can represent, a
Mixture-of-Experts layer and its router, the bytes a recipe will need, experts that really load
in 4-bit. They stand on floors and import only downward; README.md has the map. Nothing is
imported, downloaded or set here.
"""

__version__ = "0.1.0"
