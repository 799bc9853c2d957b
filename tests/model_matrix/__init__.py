"""What becomes of real architectures, as people load and quantize them: small ones with random weights.

``python -m tests.model_matrix`` builds every model of ``models``, quantizes it in every way of ``ways``, and says of each
pair how many quantized linears ran, what became of them, how far the result is from the eager quantized model, and how
often it was compiled. To add a model or a way, add an entry there; a library that one imports goes into ``needs``, and
where it is not installed the row says so.
"""

from __future__ import annotations
