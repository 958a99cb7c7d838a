"""From text to samples: a corpus, a tokenizer, Megatron token files, and the samples that training reads.

Knows text, token ids and files; knows no model, no rank and no layout.
"""
