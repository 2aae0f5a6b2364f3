// A scatter plot of some 100 000 points in plain WebGL: pan, zoom, lasso, nearest point under the pointer.
// No shader or drawing code is made at run time, so it works where a page may not evaluate text.

const VERTEX = `
attribute vec2 place; attribute vec4 color; attribute float mark;
uniform vec2 scale, shift; uniform float size, faint;
varying vec4 tone; varying float ring;
void main() {
  gl_Position = vec4(place * scale + shift, 0.0, 1.0);
  gl_PointSize = size * (1.0 + 1.2 * mark);
  tone = vec4(color.rgb, color.a * mix(faint, 1.0, mark)); ring = mark;
}`;
const FRAGMENT = `
precision mediump float;
varying vec4 tone; varying float ring;
void main() {
  float far = length(gl_PointCoord - 0.5) * 2.0;
  float soft = 1.0 - smoothstep(0.75, 1.0, far);
  if (soft <= 0.0) discard;
  float dark = ring > 0.5 ? smoothstep(0.55, 0.7, far) : 0.0;
  gl_FragColor = vec4(mix(tone.rgb, vec3(1.0, 0.72, 0.0), dark), tone.a * soft);
}`;
const FAINT = 0.22; // points that are not marked, where some are
const CELLS = 256;
const NEAR = 12;
const SPAN = 65535;

export class Scatter {
  constructor(canvas, places) {
    this.canvas = canvas;
    this.places = places; // Uint16Array, x and y of each point
    this.count = places.length / 2;
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.hidden = null;
    this.faint = 1;
    const gl = canvas.getContext("webgl", { antialias: false, alpha: true, premultipliedAlpha: false });
    if (!gl) throw new Error("this browser has no WebGL, which the map needs");
    this.gl = gl;
    this.program = built(gl);
    this.buffers = {
      place: uploaded(gl, places),
      color: uploaded(gl, new Uint8Array(4 * this.count).fill(160)),
      mark: uploaded(gl, new Uint8Array(this.count)),
    };
    this.cells = null;
    this.listeners = [];
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(canvas);
    this.listen();
  }

  setColors(colors, hidden) {
    this.hidden = hidden;
    this.fill("color", colors);
  }

  setMarks(ids) {
    const marks = new Uint8Array(this.count);
    this.faint = ids.length ? FAINT : 1;
    for (const id of ids) marks[id] = 255;
    this.fill("mark", marks);
  }

  fill(name, values) {
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.STATIC_DRAW);
    this.draw();
  }

  // From places (0 to 1) to the canvas (-1 to 1): the whole map fits, whatever the shape of the canvas.
  transform() {
    const { clientWidth: wide, clientHeight: tall } = this.canvas;
    const half = Math.min(wide, tall) * 0.95 * this.view.zoom;
    return { x: (2 * half) / wide, y: (2 * half) / tall };
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawn());
  }

  drawn() {
    const { gl, canvas, program } = this;
    const ratio = devicePixelRatio || 1;
    const [wide, tall] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (!wide || !tall) return;
    if (canvas.width !== wide || canvas.height !== tall) [canvas.width, canvas.height] = [wide, tall];
    gl.viewport(0, 0, wide, tall);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(program);
    gl.enable(gl.BLEND);
    gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const bind = (name, size, type) => {
      const at = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, size, type, true, 0, 0);
    };
    bind("place", 2, gl.UNSIGNED_SHORT);
    bind("color", 4, gl.UNSIGNED_BYTE);
    bind("mark", 1, gl.UNSIGNED_BYTE);
    const scale = this.transform();
    gl.uniform2f(gl.getUniformLocation(program, "scale"), scale.x, -scale.y);
    gl.uniform2f(gl.getUniformLocation(program, "shift"), -this.view.x * scale.x, this.view.y * scale.y);
    gl.uniform1f(gl.getUniformLocation(program, "faint"), this.faint);
    const crowd = this.count > 50000 ? 2.2 : this.count > 10000 ? 3 : 4.4;
    gl.uniform1f(gl.getUniformLocation(program, "size"), ratio * Math.min(14, crowd * this.view.zoom ** 0.35));
    gl.drawArrays(gl.POINTS, 0, this.count);
  }

  // Pixels of the canvas to places, and back.
  placeAt(px, py) {
    const scale = this.transform();
    return [
      this.view.x + ((2 * px) / this.canvas.clientWidth - 1) / scale.x,
      this.view.y + ((2 * py) / this.canvas.clientHeight - 1) / scale.y,
    ];
  }

  pixelOf(id) {
    const scale = this.transform();
    const x = (this.places[2 * id] / SPAN - this.view.x) * scale.x,
      y = (this.places[2 * id + 1] / SPAN - this.view.y) * scale.y;
    return [((x + 1) / 2) * this.canvas.clientWidth, ((y + 1) / 2) * this.canvas.clientHeight];
  }

  grid() {
    if (this.cells) return this.cells;
    const cellOf = (id) => (this.places[2 * id] >> 8) * CELLS + (this.places[2 * id + 1] >> 8);
    const starts = new Uint32Array(CELLS * CELLS + 1);
    for (let id = 0; id < this.count; id++) starts[cellOf(id) + 1]++;
    for (let i = 0; i < CELLS * CELLS; i++) starts[i + 1] += starts[i];
    const ids = new Uint32Array(this.count),
      next = starts.slice();
    for (let id = 0; id < this.count; id++) ids[next[cellOf(id)]++] = id;
    return (this.cells = { starts, ids });
  }

  nearest(px, py) {
    const { starts, ids } = this.grid();
    const [fromX, fromY] = this.placeAt(px - NEAR, py - NEAR),
      [toX, toY] = this.placeAt(px + NEAR, py + NEAR);
    const cell = (v) => Math.max(0, Math.min(CELLS - 1, Math.floor((v * SPAN) / 256)));
    let best = null,
      least = NEAR;
    for (let cx = cell(fromX); cx <= cell(toX); cx++) {
      for (let at = starts[cx * CELLS + cell(fromY)]; at < starts[cx * CELLS + cell(toY) + 1]; at++) {
        if (this.hidden?.[ids[at]]) continue;
        const [x, y] = this.pixelOf(ids[at]);
        const far = Math.hypot(x - px, y - py);
        if (far < least) [best, least] = [ids[at], far];
      }
    }
    return best;
  }

  inside(polygon) {
    const places = polygon.map(([px, py]) => this.placeAt(px, py));
    const [lowX, highX] = [Math.min(...places.map((p) => p[0])), Math.max(...places.map((p) => p[0]))];
    const found = [];
    for (let id = 0; id < this.count; id++) {
      const x = this.places[2 * id] / SPAN,
        y = this.places[2 * id + 1] / SPAN;
      if (x < lowX || x > highX || this.hidden?.[id]) continue;
      let within = false;
      for (let i = 0, j = places.length - 1; i < places.length; j = i++) {
        const [ax, ay] = places[i],
          [bx, by] = places[j];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
      }
      if (within) found.push(id);
    }
    return found;
  }

  zoomBy(factor, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    const before = this.placeAt(px, py);
    this.view.zoom = Math.max(0.5, Math.min(400, this.view.zoom * factor));
    const after = this.placeAt(px, py);
    this.view.x += before[0] - after[0];
    this.view.y += before[1] - after[1];
    this.moved();
  }

  panBy(dx, dy) {
    const [x, y] = this.placeAt(0, 0),
      [toX, toY] = this.placeAt(dx, dy);
    this.view.x -= toX - x;
    this.view.y -= toY - y;
    this.moved();
  }

  // Look at some points: at one closely, at many so that all can be seen.
  show(ids) {
    const xs = ids.map((id) => this.places[2 * id] / SPAN),
      ys = ids.map((id) => this.places[2 * id + 1] / SPAN);
    const [lowX, highX, lowY, highY] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const span = Math.max(highX - lowX, highY - lowY, 0.06);
    this.view = { x: (lowX + highX) / 2, y: (lowY + highY) / 2, zoom: Math.max(1, 0.8 / span) };
    this.moved();
  }

  moved() {
    this.draw();
    this.onmove?.(this.view);
  }

  listen() {
    const { canvas } = this;
    let drag = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const on = (name, act, options) => {
      canvas.addEventListener(name, act, options);
      this.listeners.push([name, act]);
    };
    on("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      drag = { from: at(event), last: at(event), far: 0, lasso: event.shiftKey || this.lasso ? [at(event)] : null };
    });
    on("pointermove", (event) => {
      const [x, y] = at(event);
      if (!drag) {
        this.onhover?.(this.nearest(x, y), x, y);
        return;
      }
      drag.far = Math.max(drag.far, Math.hypot(x - drag.from[0], y - drag.from[1]));
      if (drag.lasso) {
        drag.lasso.push([x, y]);
        this.onlasso?.(drag.lasso);
      } else this.panBy(x - drag.last[0], y - drag.last[1]);
      drag.last = [x, y];
    });
    on("pointerup", (event) => {
      const done = drag;
      drag = null;
      if (done?.lasso && done.far > 4) this.onselect?.(this.inside(done.lasso));
      else if (done && done.far <= 4) this.onpick?.(this.nearest(...at(event)));
      this.onlasso?.(null);
    });
    on("pointerleave", () => this.onhover?.(null));
    on(
      "wheel",
      (event) => {
        event.preventDefault();
        this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...at(event));
      },
      { passive: false },
    );
    on("keydown", (event) => {
      const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
      if (step) this.panBy(...step);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
      else if (event.key === "-") this.zoomBy(1 / 1.4);
      else if (event.key === "0") {
        this.view = { x: 0.5, y: 0.5, zoom: 1 };
        this.moved();
      } else return;
      event.preventDefault();
    });
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.observer.disconnect();
    for (const [name, act] of this.listeners) this.canvas.removeEventListener(name, act);
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }
}

function built(gl) {
  const program = gl.createProgram();
  for (const [type, source] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ]) {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  return program;
}

function uploaded(gl, values) {
  const buffer = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
  return buffer;
}
