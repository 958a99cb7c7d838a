"""What a sample's int64 values say besides token ids, in their higher bits. No numpy, no torch: `&` and `|` are the same in both.

Samples of joined documents without a loss mask have no marks: their values are the token ids.
"""

ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1
NOT_TARGET = 1 << ID_BITS  # the token does not count in the loss: masked out, or padding
BEGINS = 1 << (
    ID_BITS + 1
)  # the first token of a document, or of the padding behind the last; tokens before it are not seen
