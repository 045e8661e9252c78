"""One module for each kind of tokenizer, behind one interface (base.py); llmpipe.data.tokenizer picks the kind."""
