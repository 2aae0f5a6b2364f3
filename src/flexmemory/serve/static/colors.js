// Colours of points: one hue a group, or a scale from low to high that brightens evenly (readable without colour vision).

const SCALE = [
  [68, 1, 84],
  [65, 68, 135],
  [42, 120, 142],
  [34, 168, 132],
  [122, 209, 81],
  [253, 231, 37],
];
const GROUPS = [
  "#4477aa",
  "#ee6677",
  "#228833",
  "#b8a22c",
  "#66ccee",
  "#aa3377",
  "#e08a2e",
  "#8a8fb8",
  "#5f9e6e",
  "#c2849a",
  "#7a6a53",
  "#3fb8af",
];

export function ofGroup(group) {
  if (group < GROUPS.length) return [1, 3, 5].map((at) => parseInt(GROUPS[group].slice(at, at + 2), 16));
  const hue = (group * 137.508) % 360;
  return fromHsl(hue, 0.5, group % 2 ? 0.62 : 0.46);
}

export function ofScale(share) {
  const at = Math.max(0, Math.min(1, share)) * (SCALE.length - 1);
  const low = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[low].map((v, i) => Math.round(v + (at - low) * (SCALE[low + 1][i] - v)));
}

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

function fromHsl(hue, saturation, light) {
  const chroma = saturation * Math.min(light, 1 - light);
  const part = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - chroma * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [part(0), part(8), part(4)];
}
