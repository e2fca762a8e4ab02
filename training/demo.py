"""Open a demo of a model in the browser: `ddpm-demo outputs/mnist`.

A Gradio app for sampling, editing and interpolation. In a clone, `python training/demo.py` is the same command. It needs
`pip install ddpm_hf[demo]`.
"""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from ddpm_hf.options import check_options, option
from ddpm_hf.training.option_parser import OptionParser


@dataclass
class DemoArguments:
    model: str = option(MISSING, "folder, or repository on the Hub; may be given first, without --model")
    backend: Literal["torch", "onnxruntime"] = option("torch", "what computes the network")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: other machines may use it")
    port: int = option(7860, "port to listen on", "[0, 65535]")

    def __post_init__(self):
        check_options(self)


def main(arguments: list[str] | None = None) -> None:
    try:
        args = OptionParser(DemoArguments, __doc__.splitlines()[0]).parse_model_first(arguments)
        from ddpm_hf import DDPMPipelineCustom
        from ddpm_hf.demo.app import make_app

        pipe = DDPMPipelineCustom.from_pretrained(args.model, backend=args.backend)
        app = make_app(pipe, Path(args.model).name if Path(args.model).is_dir() else args.model)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"demo.py: error: {error}")
    app.launch(server_name=args.host, server_port=args.port or None)


if __name__ == "__main__":
    main()
