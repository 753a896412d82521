"""What a trace says about a model's routing, beside what chance would give.

A measure is a function of a trace. `draws` random draws stand behind its noise, be they bootstrap
samples of documents or draws from the null that it names; the same `seed` gives the same numbers.
In results, `x_interval` beside `x` is its 95 % interval over documents, NaN where a single document
stands for a domain or for all text.
"""
