"""Looking inside a trained mixture: record its routing over labelled text, measure, draw."""
