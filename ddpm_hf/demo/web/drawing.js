// A canvas to draw on, with a finger, a mouse, a pen or the keyboard. `pixels` (C, H, W) are in [−1, 1]; black is −1.

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Drawing {
  // show(pixels): called after each change. `pen`: an element that marks where the pen is.
  constructor(canvas, pen, channels, show) {
    Object.assign(this, { canvas, pen, show, channels, width: canvas.width, height: canvas.height });
    this.radius = Math.max(0.75, Math.min(this.width, this.height) / 24);
    this.x = (this.width >> 1) + 0.5;
    this.y = (this.height >> 1) + 0.5;
    this.clear();
    canvas.addEventListener("pointerdown", (event) => this.start(event));
    canvas.addEventListener("pointermove", (event) => this.isDown && this.lineTo(...this.place(event)));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.isDown = false));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  clear() {
    this.set(new Float64Array(this.channels * this.width * this.height).fill(-1));
  }

  set(pixels) {
    this.pixels = pixels;
    this.movePen();
    this.show(this.pixels);
  }

  start(event) {
    this.isDown = true;
    this.canvas.setPointerCapture(event.pointerId);
    [this.x, this.y] = this.place(event);
    this.lineTo(this.x, this.y);
  }

  // Where a pointer is, in pixels of the image.
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.width,
      ((event.clientY - box.top) / box.height) * this.height,
    ];
  }

  key(event) {
    const move = MOVES[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault(); // these keys scroll the page
    const [dx, dy] = move ?? [0, 0];
    const x = Math.min(Math.max(this.x + dx, 0.5), this.width - 0.5);
    const y = Math.min(Math.max(this.y + dy, 0.5), this.height - 0.5);
    if (!move || event.shiftKey) this.lineTo(x, y);
    [this.x, this.y] = [x, y];
    this.movePen();
  }

  // A line with soft edges from where the pen was.
  lineTo(x, y) {
    const parts = Math.max(1, Math.ceil(2 * Math.hypot(x - this.x, y - this.y)));
    for (let part = 0; part <= parts; part++) {
      this.dot(this.x + ((x - this.x) * part) / parts, this.y + ((y - this.y) * part) / parts);
    }
    [this.x, this.y] = [x, y];
    this.movePen();
    this.show(this.pixels);
  }

  dot(x, y) {
    this.pixels = this.pixels.map((value, place) => {
      const i = place % (this.width * this.height); // the channels one after another
      const distance = Math.hypot((i % this.width) + 0.5 - x, Math.floor(i / this.width) + 0.5 - y);
      const cover = Math.min(Math.max(this.radius + 0.5 - distance, 0), 1);
      return Math.max(value, 2 * cover - 1);
    });
  }

  movePen() {
    this.pen.style.left = `${(100 * this.x) / this.width}%`;
    this.pen.style.top = `${(100 * this.y) / this.height}%`;
  }
}
