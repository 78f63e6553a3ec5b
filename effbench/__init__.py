"""effbench: what does an efficiency method for language models cost, and what does it buy?"""

__version__ = "0.1.0"
