"""Multiplexed encoders: MUX-BERT, MUX-ELECTRA and DataMUX-RoBERTa."""
