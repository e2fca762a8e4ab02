"""The results of an evaluation as lines to print."""


def report(evaluation: dict) -> str:
    """The results, "evaluation" in metrics.json, one per line; of several samplers, also their table."""
    lines = []
    for name, bound in evaluation["bits_per_dim"].items():
        share = f", each at 1 of {bound['stride']} timesteps" if bound["stride"] > 1 else ""
        lines.append(
            f"{'bits/dim, ' + name:44s} {bound['bits_per_dim']:9.4f} ± {bound['standard_error']:.4f}  "
            f"L_T {bound['prior']:.5f}, L_0 {bound['terms'][0]:.4f}; {bound['num_images']} images{share}"
        )
    if table := evaluation["best_timesteps"]:
        rows = ", ".join(f"{row['steps']} steps {row['predicted_bits_per_dim']:.4f}" for row in table["rows"])
        lines.append(f"{'bits/dim predicted for the best timesteps':44s} {rows}")
    elif any(name.startswith("validation") for name in evaluation["bits_per_dim"]):
        lines.append("no best timesteps: they are for fixed variances, the model's is learned")
    for figure in evaluation["figures"]:
        error = f" ± {figure['standard_error']:.4g}" if "standard_error" in figure else ""
        validation = "" if figure["validation"] is None else f"  (validation images: {figure['validation']:.4f})"
        lines.append(f"{figure['name']:44s} {figure['value']:9.4f}{error}{validation}")
    for space, near in evaluation["memorization"].items():
        lines.append(
            f"closer to training images than 95 % of validation images, {space}: "
            f"{near['closer_than_5_percent_of_validation']:.1%} of samples (p = {near['closer_p_value']:.2f}; "
            "a small p indicates copies)"
        )
    return "\n".join(lines + (table_lines(evaluation["samplers"]) if evaluation["samplers"] else []))


def table_lines(table: dict) -> list[str]:
    """The table of samplers and steps, one row per line."""
    names = table["figures"]
    heads = [name.split("-")[0].split(" (")[0] for name in names]  # FD, KD, CMMD, ...
    lines = ["", f"{'sampler':34s} {'steps':>6s} {'bits/dim':>17s} " + " ".join(f"{head:>10s}" for head in heads)]
    for row in table["rows"]:
        line = f"{sampler_name(row):34s} {row['steps']:6d} {bits_per_dim(row):>17s} "
        values = (row["figures"].get(name) for name in names)
        cells = " ".join(f"{'' if value is None else format(value, '.4f'):>10s}" for value in values)
        lines.append(line + (row.get("problem") or cells))
    return lines


def sampler_name(row: dict) -> str:
    """The sampler of a row, and the variance of its chain."""
    return row["scheduler"] + (f", {row['variance_type']}" if row["variance_type"] else "")


def bits_per_dim(row: dict) -> str:
    """The bound of a row's chain with its standard error; empty if the sampler has none."""
    return "" if row["bits_per_dim"] is None else f"{row['bits_per_dim']:.2f} ± {row['standard_error']:.2f}"
