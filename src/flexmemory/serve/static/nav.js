// Addresses: every state of every page is one (#/T512, #/L3K12, #/map?space=layer0 ...).

export function address(path, params = {}) {
  const query = new URLSearchParams(
    Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined),
  );
  return `#/${path}${query.size ? `?${query}` : ""}`;
}

export const go = (path, params) => {
  location.hash = address(path, params);
};

// State that is a page's own changes the address but draws nothing again.
export const note = (path, params) => history.replaceState(null, "", address(path, params));

// A line above every page.
export function notice(...content) {
  const place = document.getElementById("notice");
  place.hidden = !content.length;
  place.replaceChildren(...content);
}

// Whether what answers is still the checkpoint.
export function announce({ applied }) {
  if (!applied.length) return notice();
  const link = document.createElement("a");
  link.href = "#/edit";
  link.textContent = `${applied.length} edit${applied.length > 1 ? "s are" : " is"} applied in memory`;
  notice(
    link,
    ". Prompt, Edit and rows on the vocabulary answer as edited; keys, maps, clusters and layers are the checkpoint's.",
  );
}
