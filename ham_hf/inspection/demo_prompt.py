# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The story that a model continues in `ham-hf demo`; it breaks off within a name from its first sentence.

Written for this project, in the manner of the novels that the embedded checkpoint was trained on.
"""

DEMO_INTRODUCTION = """\
A HAM layer has two memories: an RNN that has read everything, and a KV cache
of the tokens that the RNN predicted badly. Here one story is continued while
the cache shrinks from every token to none. It breaks off within a name that
its first sentence gave in full: Theodosia Quillinan. With a quarter of the
tokens the embedded checkpoint recalls most of it, with few or none it makes
up another name; what its cache is worth on the rest shows in the last column."""

DEMO_PROMPT = """\
In the autumn of that year there came to live at Harrowmere a young lady of the name of Theodosia Quillinan, who \
had no fortune but a small house beside the mill, and no relation in the county but an uncle, Captain Barnaby \
Trescothick, who had left his right hand in the Indies, and who wore in the place of it a hook of silver, of which \
he was exceedingly vain.

It was soon agreed at Harrowmere that Theodosia Quillinan was handsome, and sooner still that she was proud; for \
she had refused to dine at the Abbey, and had walked home alone in the rain sooner than accept of Mr. Ludovic \
Ashgrove's carriage. Mr. Ashgrove, who had never before been refused any thing, declared that he did not regard \
it; and he declared it so often, and to so many persons, that every body believed him to be very much in love.

"My niece," said Captain Trescothick, striking the table with his silver hook, "will marry whom she pleases, sir, \
and when she pleases; and if she should please to marry nobody at all, she shall have my house, and my ship in the \
bottle, and my blessing with them."

Mr. Ashgrove bowed, and said that he envied the ship; and the next morning he was gone to London, without taking \
leave of any body; and Theodosia Quillinan was not seen to weep for it.

The winter passed away very slowly. The mill was stopped by the frost, the road to the Abbey was lost in the snow, \
and the old captain, who could not be persuaded to sit by the fire, took a cold upon his chest, and talked of the \
sea. At length, on the first mild evening of the spring, a letter was brought to Mr. Ludovic Ashgrove, as he sat \
among his friends in town. It was short, and it had been wetted by the rain. "Sir," it said, "my uncle, Captain \
Barnaby Trescothick, is no more. He spoke of you at the last with kindness, and desired that you should have the \
ship in the bottle, which you were so good as to envy. I shall be always at home to a friend of his. I am, sir, \
your obliged and humble servant, Theodosia Qu"""
