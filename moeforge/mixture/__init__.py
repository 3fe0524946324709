"""A router chooses among experts at a site: routers, experts, losses, statistics, and the layer that joins them.

Pure torch; knows no method and no model. A method declares itself in a MixtureConfig; what it needs beyond that is one more
kind of router or experts here.

    config       what a mixture is, as data: strict, serialisable, imports no torch
    scores       where router logits come from: a linear map, prototypes, labels, nothing at all
    select       logits -> who goes where: top-k, top-p, threshold, capacity, expert choice, ... pure functions
    router       scores and selection joined: hidden states -> Routing
    experts/     what is chosen: whole FFNs, a shared base with deltas, ...
    layer        router, experts, what every token visits: the module that replaces a site
    context      what one forward pass shares: who is real, which domain, what the routers said
    losses       balance, z, entropy, importance, orthogonality
    statistics   load, entropy, dead experts, co-activation, by domain

Shapes: B batch, T tokens (all of a batch, flat), D width, F FFN width, E experts, K active, P pairs.
"""
