// Images (C, H, W) in [−1, 1], gray or RGB, on canvases of their size.

// The functions for the images of a model.
export function makePictures({ channels, sample_size: [height, width] }) {
  const area = height * width;
  const size = channels * area;

  function paint(canvas, x) {
    const picture = new ImageData(width, height);
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) picture.data[4 * i + c] = 255 * (x[i + area * (c % channels)] / 2 + 0.5);
      picture.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  // The images of x, one on each canvas.
  function paintAll(canvases, x) {
    canvases.forEach((canvas, i) => paint(canvas, x.subarray(i * size, (i + 1) * size)));
  }

  function clear(canvas) {
    Object.assign(canvas, { width, height });
    paint(canvas, new Float64Array(size).fill(-1));
  }

  // Fill an element with black images that have these captions. Returns their canvases.
  function rowOf(element, captions) {
    element.replaceChildren();
    return captions.map((caption) => {
      const figure = element.appendChild(document.createElement("figure"));
      const canvas = figure.appendChild(document.createElement("canvas"));
      figure.appendChild(document.createElement("figcaption")).textContent = caption;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", caption);
      clear(canvas);
      return canvas;
    });
  }

  return { paint, paintAll, clear, rowOf };
}
