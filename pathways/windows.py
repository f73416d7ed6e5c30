"""Layer windows: k consecutive layers centred on a layer, clipped to the model."""


def window_layers(center_layer: int, window: int, n_layers: int) -> range:
    """The layers that a knockout centred on `center_layer` masks.

    As the paper's k: `window // 2` layers below the centre and `ceil(window / 2) - 1` above (an
    even window leans towards the first layer, as in the peers' code), clipped to [0, n_layers - 1].
    Raises ValueError when the centre is not a layer or the window is not in 1..n_layers.
    """
    if not 0 <= center_layer < n_layers:
        raise ValueError(f"centre layer {center_layer} is not in 0..{n_layers - 1}")
    if not 1 <= window <= n_layers:
        raise ValueError(f"a window of {window} layers does not fit a model of {n_layers} layers")
    start = center_layer - window // 2
    return range(max(0, start), min(n_layers, start + window))
